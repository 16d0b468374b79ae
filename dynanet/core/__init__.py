"""The one verb and its nouns: a dynamic layer runs a unit only for the rows that keep it. Needs only torch."""
