"""``turborank models``: the catalog, and where each model is."""

from __future__ import annotations

from turborank.cli import options

EXAMPLES = (
    ("which models are there, and which need no download?", "turborank models"),
    ("for programs", 'turborank models --json | jq -r ".[].name"'),
)


def models(as_json: options.AsJson = False) -> None:
    """List the models known by name: size, length limit, licence, and where they are.

    Any folder in the published layout, and any Hugging Face id, can be given in place of a name.
    """
    from turborank import catalog

    rows = [
        {
            "name": row.name,
            "architecture": row.architecture,
            "parameters": row.parameters,
            "max_length": row.max_length,
            "licence": row.licence,
            "where": where(row),
            "default": row.name == catalog.DEFAULT,
            "note": row.note,
        }
        for row in catalog.MODELS.values()
    ]
    if as_json:
        import json

        print(json.dumps(rows, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column, justify in (
        ("name", "left"),
        ("parameters", "right"),
        ("tokens", "right"),
        ("licence", "left"),
        ("where", "left"),
    ):
        table.add_column(column, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        name = f"{row['name']} *" if row["default"] else str(row["name"])
        table.add_row(name, f"{row['parameters']:,}", f"{row['max_length']:,}", str(row["licence"]), str(row["where"]))
    Console(width=options.width(), highlight=False, markup=False).print(table)
    print("\n* the default. A folder or a Hugging Face id can be given in place of a name.")


def where(row: object) -> str:
    """``embedded``, ``cache``, ``hub``, or why the model cannot be had."""
    from turborank.architectures import ARCHITECTURES
    from turborank.catalog import Model
    from turborank.checkpoint import hub

    assert isinstance(row, Model)
    if row.architecture not in ARCHITECTURES:
        return f"not yet: {row.architecture} is missing"
    if row.embedded:
        return "embedded" if (row.folder / "model.safetensors").is_file() else "embedded, but its files are missing"
    if row.repo is None:
        return "not public"
    folder, missing = hub.cached(row.repo, row.revision)
    return "cache" if folder is not None and not missing else "hub"
