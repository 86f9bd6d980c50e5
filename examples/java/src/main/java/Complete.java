import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.mlxrunner.v1.CompletionOptions;
import io.mlxrunner.v1.CompletionRequest;
import io.mlxrunner.v1.RunnerServiceGrpc;
import io.mlxrunner.v1.StatusRequest;
import java.util.concurrent.TimeUnit;

/** Prints the status of a running server, and streams a completion from it: Complete ADDRESS. */
public class Complete {
    // The server has no deadline of its own. The first call includes the start of gRPC in a cold JVM.
    private static final long DEADLINE_SECONDS = 300;

    public static void main(String[] arguments) throws Exception {
        ManagedChannel channel = Grpc.newChannelBuilder(arguments[0], InsecureChannelCredentials.create())
                .keepAliveTime(30, TimeUnit.SECONDS) // The prefill of a long prompt may be silent.
                .build();
        try {
            complete(RunnerServiceGrpc.newBlockingStub(channel));
        } catch (StatusRuntimeException failure) {
            System.err.println(reason(failure) + ": " + failure.getStatus().getDescription());
            System.exit(1);
        } finally {
            channel.shutdownNow();
        }
    }

    private static void complete(RunnerServiceGrpc.RunnerServiceBlockingStub runner) {
        var status = runner.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS)
                .status(StatusRequest.getDefaultInstance());
        System.err.printf("%s %s, %d MiB%n", status.getState(), status.getModel().getName(), status.getMemory() >> 20);

        var request = CompletionRequest.newBuilder()
                .setPrompt("def fibonacci(n):")
                .setOptions(CompletionOptions.newBuilder().setTemperature(0).setNumPredict(64))
                .build();
        // To leave this loop before `done`, run it in a `Context.CancellableContext` and cancel that.
        var pieces = runner.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS).completion(request);
        pieces.forEachRemaining(piece -> System.out.print(piece.getContent()));
        System.out.flush();
    }

    /** Returns the name of the runner's `ErrorReason`; absent if gRPC itself failed. */
    private static String reason(StatusRuntimeException failure) throws InvalidProtocolBufferException {
        for (Any detail : StatusProto.fromThrowable(failure).getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                return detail.unpack(ErrorInfo.class).getReason();
            }
        }
        return failure.getStatus().getCode().name();
    }
}
