"""The `fedqueue` command."""

from __future__ import annotations

import typer

from cli import (
    audit,
    data,
    deadletter,
    demo,
    gc,
    invitations,
    job,
    model,
    predict,
    release,
    server,
    settings,
    site,
    worker,
)

app = typer.Typer(
    name="fedqueue",
    help="Asynchronous federated learning of object detectors: images stay where they are, models travel.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command("demo")(demo.demo)
app.add_typer(site.app, name="site")
job.app.command("invitations")(invitations.invitations)
app.add_typer(job.app, name="job")
app.add_typer(model.app, name="model")
app.add_typer(release.app, name="release")
app.add_typer(data.app, name="data")
app.add_typer(server.app, name="server")
app.add_typer(deadletter.app, name="deadletter")
app.command("audit")(audit.audit)
app.command("replay")(audit.replay)
app.command("worker")(worker.worker)
app.command("ingress")(worker.ingress)
app.command("predict")(predict.predict)
app.command("gc")(gc.gc)
app.command("settings")(settings.settings)

if __name__ == "__main__":
    app()
