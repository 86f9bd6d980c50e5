package interop;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.util.Durations;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.util.List;

/** What a call came to, as the judge reads it. */
final class Results {
    private Results() {}

    /** The result of a call that has ended: well if there is no failure. */
    static JsonObject ended(List<? extends Message> messages, Throwable failure)
            throws InvalidProtocolBufferException {
        var result = new JsonObject();
        Status status = failure == null ? Status.OK : Status.fromThrowable(failure);
        result.addProperty("code", status.getCode().name());
        result.add("messages", Json.of(messages));
        if (failure != null) {
            result.addProperty("message", status.getDescription());
            JsonObject details = details(failure);
            if (details.size() > 0) {
                result.add("details", details);
            }
        }
        return result;
    }

    private static JsonObject details(Throwable failure) throws InvalidProtocolBufferException {
        var details = new JsonObject();
        for (Any detail : StatusProto.fromThrowable(failure).getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                ErrorInfo info = detail.unpack(ErrorInfo.class);
                details.addProperty("reason", info.getReason());
                details.addProperty("domain", info.getDomain());
                var metadata = new JsonObject();
                info.getMetadataMap().forEach(metadata::addProperty);
                details.add("metadata", metadata);
            } else if (detail.is(BadRequest.class)) {
                details.add("violations", violations(detail.unpack(BadRequest.class)));
            } else if (detail.is(RetryInfo.class)) {
                var delay = detail.unpack(RetryInfo.class).getRetryDelay();
                details.addProperty("retry_seconds", Durations.toNanos(delay) / 1e9);
            }
        }
        return details;
    }

    private static JsonArray violations(BadRequest request) {
        var violations = new JsonArray();
        for (BadRequest.FieldViolation violation : request.getFieldViolationsList()) {
            var entry = new JsonObject();
            entry.addProperty("field", violation.getField());
            entry.addProperty("description", violation.getDescription());
            violations.add(entry);
        }
        return violations;
    }
}
