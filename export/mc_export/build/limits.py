"""What a backbone's spec says that cannot be built, refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable

from mc_export.backbones.base import Backbone
from mc_export.build.options import PRECISIONS, BuildOptions
from mc_runtime.bundle.manifest import Component
from mc_runtime.errors import RequestError


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
