"""`poolskip info`: size, cost, placement and weights of a model beside its base."""

import argparse
from typing import Any

HELP = "parameters, MACs, latency, placement and weights of a model beside its base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("name", help="registered model, with or without a tag")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-latency", action="store_true", help="do not measure latency")


def run(args: argparse.Namespace) -> int:
    """Print the facts of one model."""
    import json

    from ..hub.facts import describe

    facts = describe(args.name, latency=not args.no_latency)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [("model", facts["model"]), ("base", facts["base"]["name"])]
    own, base = facts, facts["base"]
    if facts["model_args"]:
        rows.append(("built with", json.dumps(facts["model_args"])))
    rows.append(("input", "×".join(map(str, own["input_size"]))))
    rows.append(("parameters", _beside(own["parameters"], base["parameters"], 1e6, "M")))
    rows.append(("MACs", _beside(own["macs"], base["macs"], 1e9, "G")))
    if "latency_ms" in own:
        rows.append(("latency", _beside(own["latency_ms"], base["latency_ms"], 1, "ms") + ", batch 1 on this CPU"))
    for (size, groups), names in _grouped(own["places"]).items():
        shown = names if len(names) < 4 else [names[0], names[1], "…", names[-1]]
        rows.append(("Pool Skip", f"e={size}, groups={groups}, after {len(names)}: {', '.join(shown)}"))
    weights = [
        f"{w['name']}: " + ", ".join(f"{k} {v} %" for k, v in w["metrics"].items()) for w in own["checkpoints"]
    ] or ["none trained"]
    rows.extend(("weights", line) for line in weights)
    rows.append(("warm starts", str(len(own["warm_starts"]))))
    previous = ""
    for key, value in rows:
        print(f"{key if key != previous else '':<12} {value}")
        previous = key
    return 0


def _grouped(places: list[dict[str, Any]]) -> dict[tuple[str, int], list[str]]:
    groups: dict[tuple[str, int], list[str]] = {}
    for place in places:
        sizes = dict.fromkeys(place["pool_size"])
        groups.setdefault(("×".join(map(str, sizes)), place["groups"]), []).append(place["name"])
    return groups


def _beside(own: float, base: float, unit: float, suffix: str) -> str:
    return f"{own / unit:.2f} {suffix} ({own / base:.2f}× the base's {base / unit:.2f} {suffix})"
