"""Generates `proto/gen` from `proto/*.proto`; `--check` only tells whether it is fresh."""

import argparse
import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVICES = ("discovery", "citadel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch)
        generate(target)
        stale = differences(target)
        if check:
            for name in stale:
                print(f"proto/gen/{name} is stale: run `make proto`", file=sys.stderr)
            return 1 if stale else 0
        for name in stale:
            source = target / name
            if source.exists():
                (HERE / "gen" / name).write_bytes(source.read_bytes())
            else:
                (HERE / "gen" / name).unlink()
    return 0


def generate(target: Path) -> None:
    """Writes what `proto/gen` should hold into `target`. Raises SystemExit when protoc refuses."""
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    # protoc derives module names from file names, so the sources are copied below proto/gen.
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        out = root / "out"
        out.mkdir()
        gen = root / "proto" / "gen"
        gen.mkdir(parents=True)
        names = sorted(path.stem for path in HERE.glob("*.proto"))
        for name in names:
            text = (HERE / f"{name}.proto").read_text()
            (gen / f"{name}.proto").write_text(text.replace('import "proto/', 'import "proto/gen/'))
        base = ["protoc", f"-I{root}", f"-I{well_known}"]
        files = [f"proto/gen/{name}.proto" for name in names]
        services = [f"proto/gen/{name}.proto" for name in SERVICES]
        for outputs, inputs in (
            ([f"--python_out={out}", f"--pyi_out={out}"], files),
            ([f"--grpc_python_out={out}"], services),
        ):
            if protoc.main([*base, *outputs, *inputs]):
                raise SystemExit("protoc refused the definitions")
        for path in (out / "proto" / "gen").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    (target / "__init__.py").write_text("")


def differences(target: Path) -> list[str]:
    current = HERE / "gen"
    names = {p.name for p in target.iterdir()} | {p.name for p in current.glob("*.py*")}
    return sorted(
        name
        for name in names
        if not (target / name).exists()
        or not (current / name).exists()
        or not filecmp.cmp(target / name, current / name, shallow=False)
    )


if __name__ == "__main__":
    raise SystemExit(main())
