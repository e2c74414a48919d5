"""Run by `make wheel-test` with the environment that the wheel was installed in: nothing comes from the sources.

python wheel_contents.py SITE_PACKAGES
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import adalora
from adalora.tasks.recipe.files import catalogue, catalogue_folder, load_recipe

ROOT = Path(__file__).parents[2]


def main(site: str) -> None:
    package = Path(adalora.__file__).parent
    assert package.is_relative_to(site), f"{package} is not what the wheel installed into {site}"
    assert distribution("adalora").version == adalora.__version__

    sources = ROOT / "src" / "adalora"
    wanted = {p.relative_to(sources) for p in sources.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    missing = sorted(str(path) for path in wanted if not (package / path).is_file())
    assert not missing, f"the wheel lacks {', '.join(missing)}"
    extra = {p.relative_to(package) for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"} - wanted
    assert not extra, f"the wheel has what the sources do not have: {', '.join(sorted(map(str, extra)))}"

    assert catalogue_folder().is_relative_to(site)
    for entry in catalogue():
        load_recipe(entry.name)
    for name in adalora.__all__:
        getattr(adalora, name)
    print(f"{len(wanted)} files, {len(catalogue())} recipes and {len(adalora.__all__)} public names are in the wheel")


if __name__ == "__main__":
    main(sys.argv[1])
