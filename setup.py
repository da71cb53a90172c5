"""The compiled parts. Both are optional: without them everything works, more slowly."""

from pathlib import Path

from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
ENGINE = Path("migrate/vm/riscv64/compiled")


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path) for path in folder.glob(pattern))


setup(
    ext_modules=[
        Extension(
            "migrate.vm.riscv64._engine",
            sources=files(ENGINE, "*.c"),
            depends=files(ENGINE, "*.h"),
            extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", *WARNINGS],
            libraries=["dl"],
            optional=True,
        ),
        Extension(
            "migrate._pages",
            sources=["migrate/_pages.c"],
            extra_compile_args=["-O3", "-std=gnu11", *WARNINGS],
            optional=True,
        ),
    ]
)
