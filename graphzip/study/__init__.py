"""Which widths meet a budget: what narrowing costs, what it saves, and how to split a budget over groups."""
