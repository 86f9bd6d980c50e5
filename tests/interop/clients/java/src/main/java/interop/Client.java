package interop;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;

/** Runs the scenarios of a list and prints one line of JSON for each. */
public final class Client {
    private Client() {}

    public static void main(String[] arguments) throws IOException {
        JsonArray scenarios = read(arguments[0]).getAsJsonArray();
        JsonObject servers = read(arguments[1]).getAsJsonObject();
        // Before Java 18 `System.out` writes in the encoding of the locale.
        var out = new PrintStream(new FileOutputStream(FileDescriptor.out), true, StandardCharsets.UTF_8);
        for (JsonElement element : scenarios) {
            JsonObject scenario = element.getAsJsonObject();
            JsonObject server = servers.getAsJsonObject(scenario.get("server").getAsString());
            out.println(results(scenario, server));
        }
    }

    private static JsonElement read(String file) throws IOException {
        return JsonParser.parseString(Files.readString(Path.of(file)));
    }

    private static JsonObject results(JsonObject scenario, JsonObject server) {
        var results = new JsonArray();
        try (var session = new Session(scenario, server)) {
            for (JsonElement step : scenario.getAsJsonArray("steps")) {
                results.add(session.run(step.getAsJsonObject()));
            }
        }
        var line = new JsonObject();
        line.add("scenario", scenario.get("name"));
        line.add("results", results);
        return line;
    }
}
