"""Where the demo's processes find broker, store and liveness: embedded in its folder, or real servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cli.demo.data import DemoData
from cli.demo.processes import Processes
from federation.settings import CONFIG_ENV, Settings, env_name

DUTIES = (1.0, 0.85, 0.65)
"""Share of time that each site in turn computes: companies do not have the same machines."""


@dataclass(frozen=True)
class Deployment:
    """`settings`: the server's. `site_configs`: a folder with <site>.toml, each site's own accounts."""

    settings: Settings
    folder: Path
    site_configs: Path | None

    def start_server(self, processes: Processes, data: DemoData) -> None:
        """The embedded aggregator, or ingress, merge worker and evaluation worker."""
        held_out = {env_name("eval_annotations"): str(data.test), env_name("eval_images"): str(data.images)}
        environment = self._server() | held_out | {env_name("threads"): "1", "OMP_NUM_THREADS": "1"}
        if self.settings.embedded:
            processes.start("aggregator", ["worker"], environment)
            return
        processes.start("ingress", ["ingress"], environment)
        processes.start("worker", ["worker", "--queue", "merge"], environment)
        processes.start("evaluator", ["worker", "--queue", "evaluate"], environment)

    def start_sites(self, processes: Processes, data: DemoData, job: str) -> None:
        """One agent per site, each with its own data, state folder and speed."""
        for number, (site, coco) in enumerate(data.sites.items()):
            if self.site_configs is None:
                accounts = self._server()
            else:
                accounts = {CONFIG_ENV: str(self.site_configs / f"{site}.toml")}
            environment = accounts | {
                env_name("site"): site,
                env_name("site_annotations"): str(coco),
                env_name("site_images"): str(data.images),
                env_name("site_state"): str(self.folder / "sites" / site),
                env_name("site_duty"): str(DUTIES[number % len(DUTIES)]),
                env_name("threads"): "1",
                env_name("poll_s"): "0.5",
                env_name("heartbeat_s"): "1",
                "OMP_NUM_THREADS": "1",
            }
            processes.start(site, ["site", "run", "--job", job], environment)

    def _server(self) -> dict[str, str]:
        s = self.settings
        return {
            env_name("broker_url"): s.broker_url.get_secret_value(),
            env_name("store_url"): s.store_url,
            env_name("store_access_key"): s.store_access_key,
            env_name("store_secret_key"): s.store_secret_key.get_secret_value(),
            env_name("live_url"): s.live_url.get_secret_value(),
        }
