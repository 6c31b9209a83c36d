"""A profile as a document, at a terminal, as a page, and two of them compared."""
