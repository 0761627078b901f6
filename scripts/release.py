"""Check that a version may be released, and try what was built; nothing is uploaded. See ``RELEASING.md``.

``make release`` runs it twice, before and after the build::

    python -m scripts.release              # the tree is clean, and all places name one version
    python -m scripts.release --try dist   # the wheel explains a sentence in an environment of its own
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "A gorgeous, witty film."


def stated(root: Path) -> dict[str, tuple[str, str]]:
    """Return the version that each place states, with its date, or "" where it has none.

    Args:
        root: The root of the repository.
    """

    def found(pattern: str, name: str) -> tuple[str, str]:
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        return (match[1], (*match.groups(), "")[1] or "") if match else ("", "")

    citation, _ = found(r"^version: (\S+)$", "CITATION.cff")
    date, _ = found(r"^date-released: ['\"]?([\d-]+)", "CITATION.cff")
    return {
        "captum_ssm/__init__.py": found(r'^__version__ = "(.*)"$', "captum_ssm/__init__.py"),
        "CHANGELOG.md": found(r"^## (\S+) \((.*)\)$", "CHANGELOG.md"),
        "CITATION.cff": (citation, date),
    }


def problems(root: Path) -> list[str]:
    """Return in words what keeps the version of a repository from being released.

    Args:
        root: The root of the repository.
    """
    versions = stated(root)
    version = versions["captum_ssm/__init__.py"][0]
    dates = {name: date for name, (_, date) in versions.items() if name != "captum_ssm/__init__.py"}
    found = [f"{name} states the version {other or 'not'}" for name, (other, _) in versions.items() if other != version]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        found.append(f"{version} is no version to release: MAJOR.MINOR.PATCH")
    found += [f"{n} has no date of release" for n, date in dates.items() if not re.fullmatch(r"\d{4}-\d\d-\d\d", date)]
    if len(set(dates.values())) > 1:
        found.append(f"the dates differ: {dates}")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    if changed := git("status", "--porcelain"):
        found.append(f"the tree is not clean:\n{changed}")
    if git("tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} is there already")
    return found


def try_wheel(folder: Path) -> None:
    """Explain a sentence with the wheel in an environment of its own, on top of the packages of this one.

    Args:
        folder: Where the wheel is.

    Raises:
        SystemExit: If there is not one wheel, or it does not work.
    """
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"there must be one wheel in {folder}, not {len(wheels)}")
    with TemporaryDirectory() as place:
        venv.create(place)
        python = str(Path(place) / "bin" / "python")
        where = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
        ).stdout.strip()
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", where, str(wheels[0])], check=True)
        behind = f"import site; site.addsitedir({site.getsitepackages()[0]!r})"  # the wheel is found first
        (Path(where) / "others.pth").write_text(behind, encoding="utf-8")
        code = f"import captum_ssm, captum_ssm.cli; assert captum_ssm.__file__.startswith({where!r}); "
        code += f"raise SystemExit(captum_ssm.cli.main(['explain', {SENTENCE!r}, '--html', 'page.html']))"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        if subprocess.run([python, "-c", code], cwd=place, env=environment, check=False).returncode:
            sys.exit("the wheel does not explain a sentence")
    version = stated(ROOT)["captum_ssm/__init__.py"][0]
    print(f"\nNothing was uploaded. To do so:\n  git tag v{version}")
    print(f"  .venv-release/bin/python -m twine upload {folder}/*\n  git push origin v{version}")


def main() -> None:
    """Check the version, or try what was built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--try", dest="folder", type=Path, help="try the wheel of this folder")
    folder = parser.parse_args().folder
    if folder is not None:
        try_wheel(folder)
    elif found := problems(ROOT):
        sys.exit("not ready for a release:\n" + "\n".join(f"* {problem}" for problem in found))


if __name__ == "__main__":
    main()
