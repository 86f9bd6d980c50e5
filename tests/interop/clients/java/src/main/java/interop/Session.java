package interop;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.protobuf.Descriptors.FieldDescriptor;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.mlxrunner.v1.RunnerServiceGrpc;
import io.mlxrunner.v1.StatusRequest;
import io.mlxrunner.v1.StatusResponse;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** One scenario on a channel of its own. */
final class Session implements AutoCloseable {
    private static final double CALL_SECONDS = 120;
    private static final long POLL_MILLIS = 20;
    private static final long UNTIL_STATUS_SECONDS = 20;

    private final ManagedChannel channel;
    private final Map<String, Call<?, ?>> calls = new HashMap<>();

    Session(JsonObject scenario, JsonObject server) {
        channel = Channels.open(scenario, server);
    }

    /** Does one step; a defect of this client becomes a result too. */
    JsonObject run(JsonObject step) {
        try {
            return switch (step.get("op").getAsString()) {
                case "call" -> call(step);
                case "start" -> start(step);
                case "cancel" -> named(step).cancel().result();
                case "finish" -> named(step).finish().result();
                case "until_status" -> untilStatus(step.getAsJsonObject("fields"));
                default -> throw new IllegalArgumentException("no such op: " + step.get("op"));
            };
        } catch (Exception defect) {
            defect.printStackTrace();
            var result = new JsonObject();
            result.addProperty("broken", defect.toString());
            return result;
        }
    }

    private JsonObject call(JsonObject step) throws Exception {
        Call<?, ?> call = begin(step);
        if (!step.has("watch_status") || !step.get("watch_status").getAsBoolean()) {
            return call.finish().result();
        }
        List<StatusResponse> statuses = new ArrayList<>();
        do {
            statuses.add(status());
        } while (!call.endsWithin(POLL_MILLIS));
        statuses.add(status());
        JsonObject result = call.result();
        result.add("statuses", Json.of(statuses));
        return result;
    }

    private JsonObject start(JsonObject step) throws Exception {
        Call<?, ?> call = begin(step);
        calls.put(step.get("as").getAsString(), call);
        if (step.has("until_messages")) {
            call.awaitMessages(step.get("until_messages").getAsInt());
        }
        return new JsonObject();
    }

    private Call<?, ?> begin(JsonObject step) throws Exception {
        JsonElement timeout = step.get("timeout_seconds");
        long millis = Math.round(1000 * (timeout == null ? CALL_SECONDS : timeout.getAsDouble()));
        var stub = RunnerServiceGrpc.newStub(channel).withDeadlineAfter(millis, TimeUnit.MILLISECONDS);
        return Call.begin(stub, step.get("rpc").getAsString(), step.get("request"));
    }

    private Call<?, ?> named(JsonObject step) {
        return calls.get(step.get("of").getAsString());
    }

    private StatusResponse status() {
        return RunnerServiceGrpc.newBlockingStub(channel)
                .withDeadlineAfter((long) CALL_SECONDS, TimeUnit.SECONDS)
                .status(StatusRequest.getDefaultInstance());
    }

    private JsonObject untilStatus(JsonObject fields) throws Exception {
        StatusResponse wanted = Json.parse(fields, StatusResponse.newBuilder()).build();
        long end = System.nanoTime() + TimeUnit.SECONDS.toNanos(UNTIL_STATUS_SECONDS);
        try {
            StatusResponse status = status();
            while (!agrees(status, wanted, fields)) {
                if (System.nanoTime() > end) {
                    throw new IllegalStateException("never came to " + fields + "; at last " + Json.of(status));
                }
                Thread.sleep(POLL_MILLIS);
                status = status();
            }
            return Results.ended(List.of(status), null);
        } catch (StatusRuntimeException failure) {
            return Results.ended(List.of(), failure);
        }
    }

    private static boolean agrees(StatusResponse status, StatusResponse wanted, JsonObject fields) {
        for (String name : fields.keySet()) {
            FieldDescriptor field = StatusResponse.getDescriptor().findFieldByName(name);
            if (!status.getField(field).equals(wanted.getField(field))) {
                return false;
            }
        }
        return true;
    }

    @Override
    public void close() {
        channel.shutdownNow();
    }
}
