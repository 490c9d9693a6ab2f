"""The wheel carries examples/ as fastvst/examples/, which pyproject.toml cannot say; the repository has one copy."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"fastvst": ".", "fastvst_kernels": "kernels"}


def packages(package: str, where: str) -> list[str]:
    """The package and everything below it, folders of data included."""
    return find_namespace_packages(where, include=[package, f"{package}.*"], exclude=["*.__pycache__"])


setup(
    packages=[*(name for package, where in FOLDERS.items() for name in packages(package, where)), "fastvst.examples"],
    # The kernels are a package of their own (kernels/pyproject.toml installs them alone); the root install brings both.
    # The folder "kernels" itself is never on the path: another package owns that name.
    package_dir={"fastvst": "fastvst", "fastvst_kernels": "kernels/fastvst_kernels", "fastvst.examples": "examples"},
)
