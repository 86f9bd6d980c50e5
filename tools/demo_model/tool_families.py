"""Kinds of tools for written conversations: names, questions, results and answers.

In questions, results and answers, ``$a`` and ``$b`` are the arguments. The others are drawn:
``$n`` a small number, ``$big`` a large one, ``$sky`` a kind of weather, ``$time`` a time, ``$word``
an invented word.
"""

from dataclasses import dataclass

SKIES = ("sunny", "cloudy", "foggy", "windy", "rainy", "snowy", "stormy", "clear")


@dataclass(frozen=True)
class Parameter:
    """An argument of a tool.

    Attributes:
        names: Names to choose from.
        kind: The kind of value to draw: place, person, noun, number, path, task, or a fixed choice
            between words divided by ``|``.
        type: Its type in JSON Schema.
    """

    names: tuple[str, ...]
    kind: str
    type: str = "string"


@dataclass(frozen=True)
class Family:
    """A kind of tool.

    Attributes:
        names: Names to choose from.
        descriptions: Descriptions to choose from.
        parameters: Its arguments, one or two.
        questions: Sentences of a user for which the tool is called.
        outcomes: Pairs of a result and the answer that follows from it.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]
    outcomes: tuple[tuple[str, str], ...]


PLACE = Parameter(("place", "place", "city", "location", "town"), "place")
PERSON = Parameter(("name", "person", "who"), "person")

WEATHER = Family(
    ("get_weather", "get_weather", "weather", "current_weather", "weather_in"),
    ("Get the weather of a place.", "Get the weather in a city.", "Current weather of a place."),
    (PLACE,),
    (
        "What is the weather in $a?",
        "What is the weather like in $a?",
        "How is the weather in $a?",
        "How is the weather in $a today?",
        "Do I need an umbrella in $a?",
        "Is it raining in $a?",
        "Will it rain in $a today?",
        "Is it warm in $a?",
        "Tell me the weather in $a.",
        "I am going to $a. What is the weather there?",
        "What's the weather in $a?",
        "weather in $a",
    ),
    (
        ('{"place": "$a", "rain": true}', "It is raining in $a. Take an umbrella."),
        ('{"place": "$a", "rain": false}', "It is not raining in $a."),
        ('{"rain": true}', "It is raining in $a. Take an umbrella."),
        ('{"place": "$a", "temperature": $n}', "It is $n degrees in $a."),
        ('{"temperature": $n}', "It is $n degrees in $a."),
        ('{"weather": "$sky", "temperature": $n}', "It is $sky in $a, with $n degrees."),
        ('{"sky": "$sky", "temperature": $n}', "It is $sky in $a, with $n degrees."),
        ('{"weather": "$sky"}', "It is $sky in $a."),
        ("$sky", "It is $sky in $a."),
        ("$sky, $n degrees", "It is $sky in $a, with $n degrees."),
    ),
)

FAMILIES = (
    WEATHER,
    Family(
        ("get_time", "current_time", "time_in", "clock"),
        ("Get the time in a place.", "The current time in a city."),
        (PLACE,),
        ("What time is it in $a?", "Tell me the time in $a.", "How late is it in $a?"),
        (('{"time": "$time"}', "It is $time in $a."), ("$time", "It is $time in $a.")),
    ),
    Family(
        ("get_population", "population", "count_people"),
        ("Get the number of people in a place.", "The population of a city."),
        (PLACE,),
        ("How many people live in $a?", "What is the population of $a?", "How big is $a?"),
        (('{"population": $big}', "$big people live in $a."), ("$big", "$big people live in $a.")),
    ),
    Family(
        ("get_distance", "distance", "route"),
        ("Get the distance between two places.", "How far it is from one city to another."),
        (Parameter(("start", "origin", "a"), "place"), Parameter(("end", "goal", "b"), "place")),
        ("How far is it from $a to $b?", "What is the distance between $a and $b?"),
        (
            ('{"km": $big}', "It is $big km from $a to $b."),
            ("$big km", "It is $big km from $a to $b."),
        ),
    ),
    Family(
        ("add", "sum", "plus"),
        ("Add two numbers.", "Return the sum of two numbers."),
        (
            Parameter(("a", "x", "first"), "number", "integer"),
            Parameter(("b", "y", "second"), "number", "integer"),
        ),
        ("What is $a plus $b?", "Add $a and $b.", "What is $a + $b?", "How much is $a plus $b?"),
        (("$big", "$a plus $b is $big."), ('{"result": $big}', "$a plus $b is $big.")),
    ),
    Family(
        ("multiply", "times", "product"),
        ("Multiply two numbers.", "Return the product of two numbers."),
        (
            Parameter(("a", "x", "first"), "number", "integer"),
            Parameter(("b", "y", "second"), "number", "integer"),
        ),
        ("What is $a times $b?", "Multiply $a by $b.", "How much is $a times $b?"),
        (("$big", "$a times $b is $big."), ('{"result": $big}', "$a times $b is $big.")),
    ),
    Family(
        ("set_timer", "timer", "start_timer"),
        ("Start a timer.", "Set a timer of some minutes."),
        (Parameter(("minutes", "time", "duration"), "number", "integer"),),
        ("Set a timer for $a minutes.", "Wake me in $a minutes.", "Start a timer of $a minutes."),
        (
            ('{"ok": true}', "The timer is set for $a minutes."),
            ("done", "The timer is set for $a minutes."),
        ),
    ),
    Family(
        ("add_reminder", "remind", "set_reminder"),
        ("Remind the user of a task.", "Add a reminder."),
        (Parameter(("task", "text", "what"), "task"),),
        ("Remind me to $a.", "Do not let me forget to $a.", "Please remind me to $a."),
        (('{"ok": true}', "I will remind you to $a."), ("done", "I will remind you to $a.")),
    ),
    Family(
        ("send_message", "send", "write_to"),
        ("Send a message to a person.", "Write a message to somebody."),
        (Parameter(("to", "name", "person"), "person"), Parameter(("text", "message"), "noun")),
        ("Send $a the message $b.", "Write $b to $a.", "Tell $a: $b."),
        (
            ('{"sent": true}', "I have sent $a the message."),
            ("sent", "I have sent $a the message."),
        ),
    ),
    Family(
        ("get_phone", "find_number", "phone_number"),
        ("Find the phone number of a person.", "Look up a phone number."),
        (PERSON,),
        ("What is the phone number of $a?", "How can I call $a?", "Find the number of $a."),
        (
            ('{"phone": "$big"}', "The phone number of $a is $big."),
            ("$big", "The phone number of $a is $big."),
        ),
    ),
    Family(
        ("translate", "translate_word", "translation"),
        ("Translate a word.", "Translate a word to a language."),
        (
            Parameter(("word", "text"), "noun"),
            Parameter(("language", "to"), "German|French|Spanish|Italian|Latin|Greek"),
        ),
        ("What is $a in $b?", "Translate $a to $b.", "How do you say $a in $b?"),
        (
            ('{"translation": "$word"}', 'In $b, $a is "$word".'),
            ("$word", 'In $b, $a is "$word".'),
        ),
    ),
    Family(
        ("define", "look_up", "dictionary"),
        ("Look up the meaning of a word.", "Get the meaning of a word."),
        (Parameter(("word", "term", "text"), "noun"),),
        ("What does the word $a mean?", "Look up the word $a.", "What is the meaning of $a?"),
        (('{"meaning": "a $word"}', "$a means: a $word."), ("a $word", "$a means: a $word.")),
    ),
    Family(
        ("play_music", "play", "play_song"),
        ("Play music.", "Play a song of an artist."),
        (Parameter(("artist", "song", "name"), "person"),),
        ("Play something by $a.", "Play a song of $a.", "I want to hear $a."),
        (('{"playing": "$word"}', "Now playing: $word."), ("$word", "Now playing: $word.")),
    ),
    Family(
        ("set_light", "light", "switch_light"),
        ("Switch the light of a room.", "Turn a light on or off."),
        (
            Parameter(("room", "where"), "kitchen|bedroom|office|garden|hall|bathroom|garage"),
            Parameter(("state", "to"), "on|off"),
        ),
        ("Turn the light in the $a $b.", "Switch $b the light in the $a.", "Light $b in the $a."),
        (
            ('{"ok": true}', "The light in the $a is $b."),
            ("done", "The light in the $a is $b."),
        ),
    ),
    Family(
        ("read_file", "open_file", "show_file"),
        ("Read a file.", "Show the text of a file."),
        (Parameter(("path", "file", "name"), "path"),),
        ("What is in the file $a?", "Show me $a.", "Read the file $a.", "Open $a."),
        (
            ('{"text": "$word"}', 'The file $a says "$word".'),
            ("$word", 'The file $a says "$word".'),
        ),
    ),
    Family(
        ("search", "web_search", "find"),
        ("Search the web.", "Find pages about a topic."),
        (Parameter(("query", "text", "topic"), "noun"),),
        ("Search for $a.", "Find something about $a.", "Search the web for $a."),
        (
            ('{"results": ["$word"]}', "I have found $word."),
            ('{"title": "$word"}', "I have found $word."),
            ("$word", "I have found $word."),
        ),
    ),
    Family(
        ("book_table", "reserve_table", "reserve"),
        ("Book a table in a restaurant.", "Reserve a table."),
        (
            Parameter(("restaurant", "place"), "place"),
            Parameter(("people", "guests"), "number", "integer"),
        ),
        ("Book a table at $a for $b people.", "Reserve a table for $b people at $a."),
        (
            ('{"ok": true}', "I have booked a table for $b people at $a."),
            ("booked", "I have booked a table for $b people at $a."),
        ),
    ),
)

PROPERTIES = (
    *("age", "height", "weight", "color", "price", "size", "owner", "address", "length", "speed"),
    *("status", "score", "level", "temperature", "rank", "version", "author", "date", "cost"),
    *("salary", "email", "team", "capital", "mayor", "value", "balance", "title", "code"),
)
"""Properties that a tool may look up; the tools of these have no phrases of their own."""


def property_family(name: str) -> Family:
    """Return the kind of tools for looking up one property of something named."""
    answer = f"The {name} of $a is"
    return Family(
        (f"get_{name}", f"find_{name}", f"{name}_of", f"lookup_{name}"),
        (f"Get the {name} of something.", f"Look up the {name} by name."),
        (Parameter(("name", "id", "key", "place", "person", "item"), "person"),),
        (f"What is the {name} of $a?", f"Tell me the {name} of $a.", f"Find the {name} of $a."),
        (
            (f'{{"{name}": $n}}', f"{answer} $n."),
            (f'{{"{name}": "$word"}}', f"{answer} $word."),
            ("$n", f"{answer} $n."),
            ("$word", f"{answer} $word."),
        ),
    )
