"""Questions with annotated reasoning: reading, checking, and turning them into prompts and token ids."""
