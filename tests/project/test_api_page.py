"""docs/api.md is what the docstrings say."""

import api_page

import starling.engine


def test_the_page_is_up_to_date() -> None:
    written = api_page.PAGE.read_text(encoding="utf-8")
    assert written == api_page.page(), "write it again: python tests/helpers/api_page.py"


def test_the_page_has_all_that_the_engine_offers() -> None:
    listed = {name for section in api_page.SECTIONS.values() for _, name in section} | {"StarlingError"}
    assert set(starling.engine.__all__) <= listed
