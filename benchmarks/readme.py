"""placeholder"""


def filled(text, folder):
    return text
