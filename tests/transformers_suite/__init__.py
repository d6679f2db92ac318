"""transformers' own common tests, run on the classes of this package. See CONTRIBUTING.md."""
