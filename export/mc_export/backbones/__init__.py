"""The diffusion backbones: one file a kind, each described by one :class:`~mc_export.backbones.base.Backbone`."""
