"""What a backbone's spec says that cannot be built, refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable

from mc_export.backbones.base import Backbone
from mc_export.build.options import PRECISIONS, BuildOptions
from mc_runtime.bundle.engines import STEP
from mc_runtime.bundle.manifest import Component
from mc_runtime.errors import RequestError

# Targets whose kernels are put into all blocks of a whole step, and count them.
_WHOLE_STEPS = frozenset({"inductor-cuda"})


def refuse_uncut(backbone: Backbone, options: BuildOptions) -> None:
    """Holds the wish to keep residuals between steps against what can be cut behind the first block.

    Raises:
        RequestError: the backbone's blocks cannot, or the target's kernels are for whole steps.
    """
    if not options.step_cache:
        return
    if backbone.stream is None:
        raise RequestError(f"--cache: {backbone.name} cannot keep a residual: {backbone.uncut}; leave --cache out")
    choice = options.choice(STEP)
    for one, option in ((choice, "--engine step="), (options.fallback, "--fallback ")):
        if one is not None and one.target in _WHOLE_STEPS:
            raise RequestError(f"--cache: {one.target} compiles whole steps only; say {option}inductor:{one.precision}")


def refuse_limited(backbone: Backbone, components: Iterable[Component], options: BuildOptions) -> None:
    """Holds the options for these engines against the backbone's limits.

    Raises:
        RequestError: one is limited; the message has the spec's reason and an option that is not limited.
    """
    limited = {(limit.component, limit.target, limit.precision): limit.reason for limit in backbone.limits}
    for component in components:
        choice = options.choice(component)
        reason = limited.get((component, choice.target, choice.precision))
        if reason is not None:
            free = [one for one in PRECISIONS[choice.target] if (component, choice.target, one) not in limited]
            instead = f"{choice.target}:{free[0]}" if free else "another target"
            raise RequestError(
                f"{backbone.name}: {component} cannot be {choice.target} {choice.precision}: {reason}; "
                f"keep it apart with --engine {component}={instead}"
            )
