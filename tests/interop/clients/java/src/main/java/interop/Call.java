package interop;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import io.grpc.stub.StreamObserver;
import io.mlxrunner.v1.ChatRequest;
import io.mlxrunner.v1.CompletionRequest;
import io.mlxrunner.v1.DetokenizeRequest;
import io.mlxrunner.v1.EmbedRequest;
import io.mlxrunner.v1.LoadRequest;
import io.mlxrunner.v1.RenderChatRequest;
import io.mlxrunner.v1.RunnerServiceGrpc.RunnerServiceStub;
import io.mlxrunner.v1.StatusRequest;
import io.mlxrunner.v1.TokenizeRequest;
import io.mlxrunner.v1.UnloadRequest;
import java.util.ArrayList;
import java.util.List;
import java.util.function.BiConsumer;
import java.util.function.Function;

/** A call that runs, or has ended, and what it has answered so far. */
final class Call<Q, A extends Message> implements ClientResponseObserver<Q, A> {
    private final List<A> messages = new ArrayList<>();
    private ClientCallStreamObserver<Q> stream;
    private boolean ended;
    private Throwable failure;

    private Call() {}

    static Call<?, ?> begin(RunnerServiceStub stub, String rpc, JsonElement request)
            throws InvalidProtocolBufferException {
        return switch (rpc) {
            case "Load" -> begin(request, LoadRequest.newBuilder(), LoadRequest.Builder::build, stub::load);
            case "Unload" -> begin(request, UnloadRequest.newBuilder(), UnloadRequest.Builder::build, stub::unload);
            case "Status" -> begin(request, StatusRequest.newBuilder(), StatusRequest.Builder::build, stub::status);
            case "Completion" -> begin(
                    request, CompletionRequest.newBuilder(), CompletionRequest.Builder::build, stub::completion);
            case "Chat" -> begin(request, ChatRequest.newBuilder(), ChatRequest.Builder::build, stub::chat);
            case "Embed" -> begin(request, EmbedRequest.newBuilder(), EmbedRequest.Builder::build, stub::embed);
            case "RenderChat" -> begin(
                    request, RenderChatRequest.newBuilder(), RenderChatRequest.Builder::build, stub::renderChat);
            case "Tokenize" -> begin(
                    request, TokenizeRequest.newBuilder(), TokenizeRequest.Builder::build, stub::tokenize);
            case "Detokenize" -> begin(
                    request, DetokenizeRequest.newBuilder(), DetokenizeRequest.Builder::build, stub::detokenize);
            default -> throw new IllegalArgumentException("no such rpc: " + rpc);
        };
    }

    private static <B extends Message.Builder, Q, A extends Message> Call<Q, A> begin(
            JsonElement request, B builder, Function<B, Q> build, BiConsumer<Q, StreamObserver<A>> rpc)
            throws InvalidProtocolBufferException {
        var call = new Call<Q, A>();
        rpc.accept(build.apply(Json.parse(request, builder)), call);
        return call;
    }

    @Override
    public void beforeStart(ClientCallStreamObserver<Q> stream) {
        this.stream = stream;
    }

    @Override
    public synchronized void onNext(A message) {
        messages.add(message);
        notifyAll();
    }

    @Override
    public synchronized void onError(Throwable failure) {
        this.failure = failure;
        onCompleted();
    }

    @Override
    public synchronized void onCompleted() {
        ended = true;
        notifyAll();
    }

    synchronized void awaitMessages(int count) throws InterruptedException {
        while (messages.size() < count && !ended) {
            wait();
        }
    }

    synchronized boolean endsWithin(long millis) throws InterruptedException {
        if (!ended) {
            wait(millis);
        }
        return ended;
    }

    synchronized Call<Q, A> finish() throws InterruptedException {
        while (!ended) {
            wait();
        }
        return this;
    }

    Call<Q, A> cancel() throws InterruptedException {
        stream.cancel("cancelled by the scenario", null);
        return finish();
    }

    synchronized JsonObject result() throws InvalidProtocolBufferException {
        return Results.ended(messages, failure);
    }
}
