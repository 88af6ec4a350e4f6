"""The README and docs: links lead somewhere, and every method has a page that tells all its settings."""

import dataclasses
import re
from pathlib import Path

import pytest

from negengine.methods import KINDS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
LINK = re.compile(r"\]\(([^)\s]+)\)")
# a method's short name -> its page, where that has another name
PAGES = {"sld": "safe-latent-diffusion"}


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    for link in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("name", KINDS)
def test_every_method_has_a_page(name):
    page = Path("docs") / f"{PAGES.get(name, name)}.md"
    assert f"({page})" in prose("README.md")
    headings = anchors(page)
    assert "when-to-use-it" in headings
    assert {"cost", "what-it-costs"} & headings
    assert re.search(r"^(## )?Source\b", prose(page), re.MULTILINE)
    settings = "".join(line.split("|")[1] for line in prose(page).splitlines() if line.startswith("| `"))
    missing = [field.name for field in dataclasses.fields(KINDS[name]) if f"`{field.name}`" not in settings]
    assert not missing


@pytest.mark.parametrize("name", KINDS)
def test_the_presets_of_a_method_are_on_its_page(name):
    text = prose(Path("docs") / f"{PAGES.get(name, name)}.md")
    assert all(f"`{preset}`" in text for preset in KINDS[name].presets if name != "dnp")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
