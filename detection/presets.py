"""Plans that are known to work, with what they reach. Plain values: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from federation.types import AggregationPolicy, StopRule, TrainingPlan


@dataclass(frozen=True)
class Preset:
    """What a job needs besides its classes and sites."""

    plan: TrainingPlan
    aggregation: AggregationPolicy
    stop: StopRule


STREET = Preset(
    plan=TrainingPlan(image_size=256, batch_size=16, local_steps=20, learning_rate=3e-3, warmup_steps=5),
    aggregation=AggregationPolicy(strategy="fedasync", alpha=0.6),
    stop=StopRule(max_versions=60),
)

GENERATED = Preset(
    plan=TrainingPlan(image_size=128, batch_size=16, local_steps=20, learning_rate=3e-3, warmup_steps=5),
    aggregation=AggregationPolicy(strategy="fedasync", alpha=0.6),
    stop=StopRule(max_versions=40),
)
