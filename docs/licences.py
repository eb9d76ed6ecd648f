"""Print the licences of the installed packages in the form of docs/licences.md.

    python3 -m venv v && v/bin/pip install . && v/bin/python docs/licences.py > docs/licences.md

Ends with an error if a licence is not on the list of those that an MIT project can depend on.
"""

import importlib.metadata
import re
import sys

FINE = ("apache", "bsd", "0bsd", "mit", "isc", "psf", "python software", "mpl", "mozilla", "hpnd")
FINE += ("unlicense", "zlib", "cc0")
NOT_OURS = {"pixelflow_jax", "pip", "setuptools"}


def licence(meta) -> str:
    """Return a short name: the expression, else the classifiers, else the first line of the text."""
    if meta.get("License-Expression"):
        return meta["License-Expression"]
    classified = [c for c in meta.get_all("Classifier") or () if c.startswith("License ::")]
    names = [c.rpartition(" :: ")[2] for c in classified if not c.endswith("OSI Approved")]
    text = (meta.get("License") or "not said").strip().splitlines()[0].strip()
    return ", ".join(sorted(names)) or text


def is_fine(text: str) -> bool:
    """Return whether every licence that applies is on the list; of alternatives, one is enough."""
    parts = re.split(r",|\band\b", text.lower())
    return all(any(re.search(rf"\b{word}\b", part) for word in FINE) for part in parts)


def main() -> None:
    """Run the command."""
    found = {d.metadata["Name"]: d.metadata for d in importlib.metadata.distributions()}
    rows = sorted((n, m["Version"], licence(m)) for n, m in found.items() if n not in NOT_OURS)
    print("# Licences of the dependencies\n\n`docs/licences.py` made this list.\n")
    print("| package | version | licence |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    odd = [f"{name} ({text})" for name, _, text in rows if not is_fine(text)]
    if odd:
        sys.exit(f"error: look at the licences of {', '.join(odd)}")


if __name__ == "__main__":
    main()
