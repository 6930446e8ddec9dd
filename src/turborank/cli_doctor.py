"""``turborank doctor``: what is installed, what was chosen, and whether it works."""

from __future__ import annotations

from turborank import cli_options as options

EXAMPLES = (
    ("is everything well, and which engine is used?", "turborank doctor"),
    ("check a model of your own, run by numpy", "turborank doctor --model ./my-model --engine reference"),
)


def doctor(
    model: options.Model = None,
    engine: options.Engine = "auto",
    precision: options.Precision = "auto",
    as_json: options.AsJson = False,
) -> int:
    """Examine this installation: versions, CPU, engines, model files, and two real scores.

    The exit code is 1 when something is broken. Paste the output when you report a problem.
    """
    from turborank.doctor import examine

    findings = list(examine(model, engine=engine, precision=precision))
    broken = [finding for finding in findings if not finding.well]
    if as_json:
        import json

        print(json.dumps([finding._asdict() for finding in findings], ensure_ascii=False))
        return 1 if broken else 0
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(f"{topic}")
        print(f"  {'ok    ' if finding.well else 'BROKEN'}  {finding.what:<24} {finding.value}")
    print(f"\n{len(broken)} broken: {', '.join(finding.what for finding in broken)}" if broken else "\nall is well")
    return 1 if broken else 0
