"""GPT-2 weights in other programs' formats, in and out, and params trees as files."""
