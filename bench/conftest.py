import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="also the largest shape on a CPU (minutes)")
