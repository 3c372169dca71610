"""Types of the part of pytest-xdist that the tests use; the package ships none."""
