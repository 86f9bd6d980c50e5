package interop;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.MessageOrBuilder;
import com.google.protobuf.util.JsonFormat;
import java.util.List;

/** Messages from JSON and to JSON. */
final class Json {
    private Json() {}

    /** Fills a builder from a scenario's message, and returns it. */
    static <B extends Message.Builder> B parse(JsonElement message, B builder)
            throws InvalidProtocolBufferException {
        JsonFormat.parser().merge(repeated(message).toString(), builder);
        return builder;
    }

    static JsonElement of(MessageOrBuilder message) throws InvalidProtocolBufferException {
        return JsonParser.parseString(JsonFormat.printer().print(message));
    }

    static JsonArray of(List<? extends Message> messages) throws InvalidProtocolBufferException {
        var array = new JsonArray();
        for (Message message : messages) {
            array.add(of(message));
        }
        return array;
    }

    /** Writes out every {@code {"$repeat": "ab", "count": 3}}. */
    private static JsonElement repeated(JsonElement element) {
        if (element.isJsonArray()) {
            var array = new JsonArray();
            element.getAsJsonArray().forEach(item -> array.add(repeated(item)));
            return array;
        }
        if (!element.isJsonObject()) {
            return element;
        }
        JsonObject object = element.getAsJsonObject();
        if (object.has("$repeat")) {
            return new JsonPrimitive(
                    object.get("$repeat").getAsString().repeat(object.get("count").getAsInt()));
        }
        var written = new JsonObject();
        object.entrySet().forEach(entry -> written.add(entry.getKey(), repeated(entry.getValue())));
        return written;
    }
}
