"""BABILong: facts about a small world, spread over a long text, and a question that takes one or more of them."""
