"""Does one objective, the next token or the next embedding, work for both directions, or do specialised ones win?"""
