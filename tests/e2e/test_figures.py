"""The figures in the README, measured again: `make test-slow`, half an hour on two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_demo import fedqueue
from tests.integration.servers import ROOT

STREET = ROOT.parent / "shared" / "data" / "street"
MINUTES = 60


@pytest.mark.slow
@pytest.mark.timeout(25 * MINUTES)
def test_the_federation_beats_every_site_on_generated_scenes(tmp_path: Path) -> None:
    fedqueue("demo", "--out", str(tmp_path / "demo"), limit_s=20 * MINUTES)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["federation_beats_every_site"]
    assert summary["federation"]["mAP@0.5"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(45 * MINUTES)
def test_real_street_images(tmp_path: Path) -> None:
    if not STREET.is_dir():
        pytest.skip(f"the Federated Street images are not at {STREET}")
    out = tmp_path / "street"
    fedqueue("demo", "--data", str(STREET), "--sites", "3", "--out", str(out), limit_s=40 * MINUTES)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["federation_beats_every_site"]
    assert summary["federation"]["mAP@0.5"] >= 0.55
