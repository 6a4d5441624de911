"""README.md from nbs/index.ipynb: its text and visible code, with links that start at the repository."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = re.compile(r"^#\|\s*(hide|include:\s*false|echo:\s*false|default_exp)", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)")  # a link or image to a file; a file of the index lies in nbs/


def readme(index: Path = ROOT / "nbs/index.ipynb") -> str:
    """The Markdown of the index notebook as a README."""
    parts = []
    for cell in json.loads(index.read_text(encoding="utf8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"\1nbs/", text).replace("](nbs/../", "]("))
        elif not HIDDEN.search(text) and "parameters" not in cell["metadata"].get("tags", []):
            code = re.sub(r"^#\|.*\n", "", text, flags=re.M)
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf8")
