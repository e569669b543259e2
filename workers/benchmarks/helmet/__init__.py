"""HELMET's tasks with exact scores: retrieval from JSON, questions about documents, many-shot in-context learning."""
