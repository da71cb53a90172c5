"""The guest of the tests, the benchmarks and the default demo: source and built image.

No Python here: `migrate.vm.guest` patches parameters into the image and reads its console;
`tools/build_guest.py` builds it.
"""
