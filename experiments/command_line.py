"""What the studies' command lines share."""


class Stop(Exception):
    """Ends a study with one line for the user."""


def values(text: str) -> list[str]:
    """'a,b' -> [a, b], commas inside brackets left alone; | separates where a value holds commas: 'a:b=1,c=2|d'."""
    separator = '|' if '|' in text else ','
    parts, depth = [''], 0
    for letter in text:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == separator and depth <= 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
