"""Beginnings of texts of many kinds, for models to go on from: the same for every model and version."""

PROMPTS = (
    "The old lighthouse keeper climbed the stairs every evening, and on that particular night he noticed",
    "Photosynthesis is the process by which plants turn sunlight into chemical energy. In the first step,",
    "Question: What is the capital of France, and what is it known for?\nAnswer:",
    "Dear Ms. Morgan,\n\nThank you for your letter of the 12th of March. I am writing to let you know that",
    "To make a simple tomato soup, begin by heating some oil in a large pot. Then",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The city council met on Tuesday evening to discuss the new budget. According to the mayor,",
    '"Where have you been?" she asked.\n\n"I went down to the river," he said, "and there I saw',
    "In the second half of the nineteenth century, the railway changed how people lived because",
    "Installation\n\nThe package needs Python 3.10 or newer. To install it, run the following command:\n\n",
    "The patient was a 54-year-old man with a history of high blood pressure who came to the hospital with",
    "If a train travels 60 miles in one hour and 30 minutes, then its average speed is",
    "Five things to remember when you are looking for a new apartment:\n\n1.",
    "The theory of supply and demand explains how prices are set in a market. When the supply of a good rises,",
    "Once upon a time there was a little girl who lived with her grandmother at the edge of a forest. One day",
    "User: My computer is very slow lately. What can I do?\nAssistant:",
)
