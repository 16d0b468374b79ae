"""One mechanism per file: what adapts, and the card beside it (cards/) with its measured gain and cost."""
