"""The compiled parts. Both are optional: without them everything works, more slowly."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "migrate.vm.riscv64._engine",
            sources=["migrate/vm/riscv64/_engine.c"],
            extra_compile_args=[
                "-O2",
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Wno-missing-field-initializers",
            ],
            libraries=["dl"],
            optional=True,
        ),
        Extension(
            "migrate._pages",
            sources=["migrate/_pages.c"],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Wno-missing-field-initializers",
            ],
            optional=True,
        ),
    ]
)
