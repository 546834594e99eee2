"""One file a target: from an exported program to the files its library loads."""
