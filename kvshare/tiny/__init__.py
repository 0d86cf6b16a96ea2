"""`kvshare/tiny`: a small Llama-architecture model, really trained on public-domain books. Data, no code."""
