"""Adds the pages of experiments/ to the site, where they stand beside docs/ in the repository."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ADDED = (
    "experiments/README.md",
    "experiments/replicate.md",
    "experiments/scale.md",
    "experiments/study/study.png",
)


def on_files(files, config):
    """Add the files to those of docs/, under the same paths."""
    for path in ADDED:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Turn links between docs/ and experiments/ into links of the site."""
    if "/" in page.file.src_uri:
        return markdown.replace("](../docs/", "](../")
    return markdown.replace("](../experiments/", "](experiments/")
