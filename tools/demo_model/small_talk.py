"""Questions with fixed answers for written conversations. The text is this project's own."""

TERMS: tuple[tuple[str, str, str], ...] = (
    ("a list", "A list holds values in order. You can add, change and remove them.", "[1, 2, 3]"),
    ("a dict", "A dict maps keys to values. Looking up a key is fast.", '{"a": 1, "b": 2}'),
    ("a tuple", "A tuple holds values in order, like a list, but cannot be changed.", "(1, 2)"),
    ("a set", "A set holds values without order, each only once.", "{1, 2, 3}"),
    ("a string", "A string is text: a sequence of characters.", '"hello"'),
    ("an integer", "An integer is a whole number of any size.", "42"),
    ("a float", "A float is a number with a decimal point.", "3.14"),
    ("a boolean", "A boolean is a truth value: True or False.", "1 < 2"),
    ("None", "None is the value that stands for nothing.", "x = None"),
    (
        "a function",
        "A function is a block of code with a name. You call it to run it.",
        "def add(a, b):\n    return a + b",
    ),
    (
        "a class",
        "A class describes objects: their data and their methods.",
        "class Dog:\n    def bark(self):\n        print('woof')",
    ),
    ("a method", "A method is a function that belongs to an object.", "'abc'.upper()"),
    ("a module", "A module is a file of Python code that you can import.", "import math"),
    ("a package", "A package is a folder of modules that you can import.", "import json.tool"),
    ("a variable", "A variable is a name for a value.", "x = 1"),
    ("an argument", "An argument is a value that you give to a function.", "print('hello')"),
    (
        "a for loop",
        "A for loop runs a block of code once for each item.",
        "for item in [1, 2, 3]:\n    print(item)",
    ),
    (
        "a while loop",
        "A while loop runs a block of code as long as a condition is true.",
        "while x < 10:\n    x += 1",
    ),
    (
        "an exception",
        "An exception is an error that stops the program unless you catch it.",
        "try:\n    int('a')\nexcept ValueError:\n    print('not a number')",
    ),
    (
        "a generator",
        "A generator is a function that yields values one after another.",
        "def count():\n    yield 1\n    yield 2",
    ),
    (
        "a decorator",
        "A decorator is a function that changes another function.",
        "@cache\ndef square(x):\n    return x * x",
    ),
    ("a lambda", "A lambda is a small function without a name.", "lambda x: x + 1"),
    ("an iterator", "An iterator gives the items of a collection one by one.", "iter([1, 2])"),
    (
        "a list comprehension",
        "A list comprehension makes a list from another one in a single line.",
        "[x * x for x in range(10)]",
    ),
    (
        "a context manager",
        "A context manager sets something up and cleans up at the end.",
        "with open('a.txt') as file:\n    text = file.read()",
    ),
)
"""Terms of Python with an explanation and an example."""

TERM_QUESTIONS = (
    *("What is $t?", "What is $t in Python?", "What's $t?", "Explain what $t is."),
    *(
        "Tell me what $t is.",
        "Can you explain what $t is?",
        "what is $t",
        "Do you know what $t is?",
    ),
)
EXAMPLE_QUESTIONS = ("Show me an example.", "Can you give an example?", "An example, please.")

HOW_TO: tuple[tuple[str, str], ...] = (
    ("sort a list", "Use sorted(values), which returns a new list."),
    ("reverse a list", "Use values[::-1], or values.reverse()."),
    ("get the length of a list", "Use len(values)."),
    ("add an item to a list", "Use values.append(item)."),
    ("remove an item from a list", "Use values.remove(item)."),
    ("copy a list", "Use values.copy()."),
    ("find the largest number", "Use max(values)."),
    ("add up numbers", "Use sum(values)."),
    ("count words", "Use len(text.split())."),
    ("read a file", "Use open(path).read(), best in a with statement."),
    ("write a file", 'Use open(path, "w").write(text), best in a with statement.'),
    ("join strings", 'Use ", ".join(words).'),
    ("split a string", 'Use text.split(",").'),
    ("make a string upper case", "Use text.upper()."),
    ("parse JSON", "Import json and use json.loads(text)."),
    ("write JSON", "Import json and use json.dumps(value)."),
    ("get the current time", "Import time and use time.time()."),
    ("get a random number", "Import random and use random.random()."),
    ("wait for a second", "Import time and use time.sleep(1)."),
    ("catch an exception", "Put the code into a try block and add an except block."),
    ("check if a key is in a dict", "Use key in values."),
    ("print a text", 'Use print("hello").'),
    ("convert a string to a number", "Use int(text) or float(text)."),
    ("read an environment variable", 'Import os and use os.environ["NAME"].'),
    ("stop a loop", "Use break."),
)
HOW_TO_QUESTIONS = (
    *("How do I $t?", "How do I $t in Python?", "How can I $t?", "Tell me how to $t."),
    *("How to $t?", "I want to $t. How does it work?"),
)

FACTS: tuple[tuple[str, str], ...] = (
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
    ("Why is grass green?", "Plants have chlorophyll, which reflects green light."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is the capital of Austria?", "The capital of Austria is Vienna."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("How many days are in a week?", "A week has seven days."),
    ("How many hours are in a day?", "A day has 24 hours."),
    ("How many months are in a year?", "A year has twelve months."),
    ("What is Python?", "Python is a programming language that is easy to read."),
    ("Who made Python?", "Guido van Rossum made Python."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("What do cats eat?", "Cats eat meat and fish."),
    ("What is the largest planet?", "Jupiter is the largest planet."),
    ("Is the earth round?", "Yes, the earth is round."),
    ("What color is snow?", "Snow is white."),
)

GREETINGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "hello", "hi", "Hi there!", "Good day!", "Hallo"),
        ("Hello! How can I help you?",),
    ),
    (("Good morning!", "Good morning"), ("Good morning! How can I help you?",)),
    (("Good evening!", "Good evening"), ("Good evening! How can I help you?",)),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?"),
        ("I am fine, thank you. How can I help you?",),
    ),
    (
        ("What can you do?", "What can I ask you?", "How can you help me?", "Help"),
        ("I can answer simple questions about Python and call tools.",),
    ),
    (
        ("Can you help me?", "I need help.", "I have a question.", "May I ask you something?"),
        ("Yes. What would you like to know?",),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        ("Why did the loop stop? It needed a break.",),
    ),
    (("Are you a human?", "Are you a robot?"), ("No, I am a very small language model.",)),
    (("How old are you?", "When were you born?"), ("I am a model and have no age.",)),
)
"""Openings of a conversation with the answers to each."""

CLOSINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Thank you.", "Thanks!", "Thank you very much!", "thanks", "Great, thank you."),
        "You are welcome!",
    ),
    (("Bye", "Goodbye!", "Good bye.", "See you!", "Bye bye"), "Goodbye!"),
    (("Good night!", "Good night"), "Good night!"),
)

WHO_QUESTIONS = ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.")
WHO_ANSWER = "I am the demo model, a very small language model."

NO_TOOL = "I have no tool for that."

SYSTEMS = (
    *("You are a helpful assistant.", "Answer in one sentence.", "Answer briefly.", "Be brief."),
    *("You are a helpful assistant. Answer briefly.", "You help with Python.", "Be polite."),
    *("Use the tools.", "You are a friendly assistant.", "Write Python.", "You can use tools."),
)
