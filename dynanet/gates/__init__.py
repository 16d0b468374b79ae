"""How scores are made (scorers, confidence) and how they become keep (rules)."""
