"""The bundle: engine files, a tokenizer and sampler tables, and a manifest that names and hashes them all."""
