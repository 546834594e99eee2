"""Engines on their way into a bundle: from the cache, or built into it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mc_export.build.cache import build_entry, content_key, copy_files, lookup
from mc_export.build.engine import engine_of_notes, make_engine
from mc_export.build.graph import graph_of
from mc_export.build.layer_choice import LayerChoice
from mc_export.build.options import BuildOptions, EngineChoice
from mc_export.build.parts import Part
from mc_export.build.plan import ToLayers, as_it_is
from mc_export.build.progress import ProgressLog, State
from mc_export.build.reports import EngineReport
from mc_export.build.usual import plan_wishes
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import Calibration, target_facts
from mc_export.lower.tensorrt import builds_plans, plan_facts
from mc_runtime.bundle.manifest import Component, Engine, Sizes

ENGINES = "engines"
FALLBACK = "fallback"


def fallback_name(component: str) -> str:
    """What progress and report call a component's engine of the fallback."""
    return f"{component} (fallback)"


@dataclass
class Placing:
    """Engines on their way into a bundle, with what is told of them."""

    stage: Path
    checkpoint: Checkpoint
    options: BuildOptions
    sizes: Sizes
    log: ProgressLog
    keys: list[str] = field(default_factory=list)
    reports: list[EngineReport] = field(default_factory=list)

    def check(self, component: Component, choice: EngineChoice) -> None:
        """Raises what `place` would for this choice of any program: better before other engines are built, for many minutes.

        Raises:
            RequestError: no plan is built for a compute capability that was named, or the calibration has nothing on it.
            EngineError: this machine lacks what the target needs, or no layers can be within the loss.
        """
        target_facts(choice.target, choice.precision)
        if builds_plans(choice.target):
            plan_facts(choice.target, self.options.compute_capabilities, choice.precision)
        if layers := self._layers(choice):
            layers.facts(component, choice)

    def place(self, part: Part, facts: Mapping[str, object], choice: EngineChoice, folder: str) -> Engine:
        """Copies one engine into a folder of the bundle, building it first if the cache has none."""
        start = time.monotonic()
        component, force = part.component, self.options.force
        name = component if folder == ENGINES else fallback_name(component)
        layers = self._layers(choice)
        graph_facts = {**facts, "graph": graph_of(choice), **(layers.facts(component, choice) if layers else {})}
        graph_key = "" if force else content_key(graph_facts)
        target = target_facts(choice.target, choice.precision)
        facts = {**graph_facts, "target": choice.target, "precision": choice.precision, **target}
        wishes = plan_wishes(component, self.checkpoint, self.sizes, self.options.compute_capabilities)
        if builds_plans(choice.target):
            facts |= {
                "plan": plan_facts(choice.target, wishes.capabilities, choice.precision),
                "usual": wishes.usual,
                "served": wishes.served,
            }
        if choice.is_quantized:
            facts |= {"calibrated_on": self.checkpoint.sha256}
        key = content_key(facts)
        to_layers: ToLayers = partial(layers.apply, choice=choice, tick=self.log.within) if layers else as_it_is

        def make(directory: Path) -> Mapping[str, object]:
            return make_engine(
                part,
                choice,
                directory,
                partial(self.log.enter, name),
                self._calibrate,
                graph_key,
                wishes,
                self.log.within,
                to_layers,
            )

        entry = None if force else lookup(key)
        state = State.CACHED if entry else State.BUILT
        entry = entry or build_entry(key, make)
        copy_files(entry, self.stage / folder)
        self.log.enter(name, state)
        engine = engine_of_notes(entry.notes, folder)
        self.keys.append(key)
        self.reports.append(self._report(name, engine, state, time.monotonic() - start, entry.notes.get("states", {})))
        return engine

    def _layers(self, choice: EngineChoice) -> LayerChoice | None:
        return LayerChoice(self.checkpoint, self.options.calibration, self.options.force) if choice.is_by_layer else None

    def _calibrate(self, component: str) -> Calibration:
        from mc_export.quantize.calibration import calibration_inputs

        inputs: Calibration = calibration_inputs(self.checkpoint, component)
        return inputs

    def _report(self, name: str, engine: Engine, state: State, seconds: float, states: Mapping[str, float]) -> EngineReport:
        assert engine.error is not None
        return EngineReport(
            component=name,
            target=engine.target,
            precision=engine.precision.value,
            state=state.value,
            seconds=round(seconds, 2),
            max_abs=engine.error.max_abs,
            relative_l2=engine.error.relative_l2,
            bytes=sum((self.stage / file).stat().st_size for file in engine.files),
            states=states,
        )
