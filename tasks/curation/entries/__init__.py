"""Lists of words and phrases that captions are matched with.

`wordnet.txt.gz` holds the lemmas of WordNet 3.1's four indexes, underscores as spaces, sorted; its licence lies
beside it.
"""
