"""`defeat catalog`: what job specs may name."""

from defeat.cli.console import JsonFlag, Output
from defeat.client.client import Client


def catalog(as_json: JsonFlag = False) -> None:
    """Show the detectors, backbones, methods and dataset formats of the server; --json prints all of the catalog."""
    out = Output(as_json)
    with Client() as client:
        offer = client.catalog()
    out.json(offer)
    for kind in ("detectors", "methods", "dataset_formats"):
        out.table(
            [kind.replace("_", " "), "summary"],
            [(name, value.get("summary")) for name, value in offer.get(kind, {}).items()],
        )
        out.line("")
    out.table(
        ["pretrained teachers", "weights"],
        [(name, ", ".join(value.get("weights", {}))) for name, value in offer.get("pretrained", {}).items()],
    )
    out.line("")
    out.table(
        ["backbones", "parameters"],
        [(name, _parameters(value.get("parameters"))) for name, value in offer.get("backbones", {}).items()],
    )


def _parameters(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.2f} M"
