"""The model card of a release: a value for programs, and the same in Markdown for people.

After Mitchell et al. 2019, "Model Cards for Model Reporting", arXiv 1810.03993. It names no site that has not allowed
it: without that a site is "a participant", and the numbers that would tell who it is are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from aggregator.consent import Standing
from aggregator.lineage import Lineage
from federation.governance import Card, CardContributor, CardEvaluation, Decision
from federation.jobs import Job
from federation.types import MAP, SERVER, Evaluation
from storage.releases import MODEL, ONNX, Release

ANONYMOUS = "a participant"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~&-])")


def make_card(
    job: Job,
    release: Release,
    decision: Decision,
    standing: Standing,
    found: Lineage,
    evaluations: Sequence[Evaluation],
    onnx_sha256: str | None,
    onnx_problem: str,
) -> Card:
    """`evaluations`: all that was measured of this version. `found`: its lineage."""
    proposal = release.proposal
    named = named_sites(release, standing)
    return Card(
        job=job.id,
        version=proposal.version,
        purpose=proposal.purpose,
        classes=job.spec.classes,
        arch=job.spec.arch,
        image_size=job.spec.plan.image_size,
        model_sha256=proposal.model_sha256,
        file_sha256=proposal.file_sha256,
        file_bytes=proposal.file_bytes,
        onnx_sha256=onnx_sha256,
        onnx_problem=onnx_problem,
        initial_sha256=job.initial.sha256,
        aggregation=job.spec.aggregation.model_dump(mode="json"),
        spans=found.spans,
        updates=found.updates,
        mean_staleness=found.mean_staleness,
        rule=job.spec.release,
        contributors=len(proposal.contributors),
        approved=len(standing.approved),
        named=tuple(
            CardContributor(site=site, share=part.share, updates=part.updates, images=part.images)
            for site, part in found.parts.items()
            if site in named
        ),
        evaluations=tuple(_evaluation(evaluation, named) for evaluation in evaluations),
        proposed_at=proposal.at,
        decided_at=decision.at,
    )


def named_sites(release: Release, standing: Standing) -> frozenset[str]:
    """Contributors that approved and let themselves be named."""
    newest = release.newest
    return frozenset(site for site in standing.approved if newest[site].consent.consent().site is not None)


def _evaluation(evaluation: Evaluation, named: frozenset[str]) -> CardEvaluation:
    known = evaluation.who == SERVER or evaluation.who in named
    return CardEvaluation(
        who=evaluation.who if known else None,
        num_images=evaluation.num_images if known else None,
        metrics=evaluation.metrics,
        per_class=evaluation.per_class if known else {},
    )


def to_markdown(card: Card) -> str:
    """The card for people."""
    rule = "all of them" if card.rule.approvals == "all" else "more than half of them"
    spans = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in card.spans)
    unnamed = card.contributors - len(card.named)
    sections = [
        f"# {card.job}, version {card.version}",
        "An object detector that several companies trained together without exchanging their images (asynchronous "
        "federated learning). Each of them was asked whether this version may be given away.",
        "## Model",
        *_table(
            ("", ""),
            [
                ("architecture", _text(card.arch)),
                (
                    "input",
                    f"{card.image_size} × {card.image_size} pixels, RGB, 0 to 1; the whole image squeezed into it",
                ),
                ("classes", f"{', '.join(_text(name) for name in card.classes)}; label 1 is the first"),
                (MODEL, f"{card.file_bytes} bytes, sha256 `{card.file_sha256}`"),
                (
                    ONNX,
                    f"sha256 `{card.onnx_sha256}`"
                    if card.onnx_sha256
                    else f"none: {_text(card.onnx_problem)}",
                ),
            ],
        ),
        "## Purpose",
        _text(card.purpose) or "None was stated.",
        "## Figures",
        *_figures(card),
        "## Contributors",
        f"{card.contributors} sites trained it, with {card.updates} updates. A site's share is the sum of the weights "
        "with which its updates were merged, divided by the sum over all updates.",
        *_table(
            ("site", "share", "updates", "images"),
            [
                *(
                    (site.site, f"{site.share:.1%}", str(site.updates), str(site.images))
                    for site in card.named
                ),
                *[(ANONYMOUS, "", "", "")] * unnamed,
            ],
        ),
        "Their images never left them, and nothing is known here of what they show.",
        "## Consent",
        f"Proposed {card.proposed_at:%Y-%m-%d}, decided {card.decided_at:%Y-%m-%d %H:%M} UTC. The job's rule asks for "
        f"the approval of {rule}: {card.approved} of {card.contributors} approved. consents.json holds each approval "
        "with its signature (Ed25519) of this model's digest and purpose; `fedqueue release verify` checks them. What "
        "a recipient may do with it, and who answers for it, is a matter of a contract: this card is none.",
        "## Lineage",
        *_table(
            ("", ""),
            [
                ("version in the log", f"{card.version}, sha256 `{card.model_sha256}`"),
                ("led to by versions", spans),
                ("began with", f"sha256 `{card.initial_sha256}`"),
                ("merged by", _text(str(card.aggregation.get("strategy")))),
                ("updates", f"{card.updates}, mean staleness {card.mean_staleness:.2f}"),
            ],
        ),
        "## Caveats",
        "The figures are of the images of whoever measured, and those of a site are its own word. Test it on images of "
        "the place where it is to be used. Weights can tell something about the images behind them: no noise was "
        "added.",
    ]
    return "\n\n".join(sections) + "\n"


def _figures(card: Card) -> list[str]:
    if not card.evaluations:
        return ["Nobody measured this version."]
    names = sorted({name for evaluation in card.evaluations for name in evaluation.metrics})
    rows = [
        (
            evaluation.who or ANONYMOUS,
            "" if evaluation.num_images is None else str(evaluation.num_images),
            *(f"{evaluation.metrics[name]:.4g}" if name in evaluation.metrics else "" for name in names),
        )
        for evaluation in card.evaluations
    ]
    figures = _table(("measured by", "images", *(_text(name) for name in names)), rows)
    for evaluation in card.evaluations:
        classes = evaluation.per_class.get(MAP) or next(iter(evaluation.per_class.values()), {})
        if evaluation.who == SERVER and classes:
            name = MAP if MAP in evaluation.per_class else next(iter(evaluation.per_class))
            figures += [
                f"By class, {_text(name)}, on the server's images:",
                *_table(("class", ""), [(_text(label), f"{value:.4g}") for label, value in classes.items()]),
            ]
    return figures


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """One block of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _text(text: str) -> str:
    """Words of others as one line that is nothing but text in Markdown."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
