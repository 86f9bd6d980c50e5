package interop;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import io.grpc.ClientInterceptor;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.MetadataUtils;
import io.netty.channel.EventLoopGroup;
import io.netty.channel.MultiThreadIoEventLoopGroup;
import io.netty.channel.nio.NioIoHandler;
import io.netty.channel.socket.nio.NioDomainSocketChannel;
import io.netty.util.concurrent.DefaultThreadFactory;
import java.net.UnixDomainSocketAddress;
import java.util.concurrent.TimeUnit;

/** How a scenario connects to its server. */
final class Channels {
    private static final String UNIX = "unix:";
    private static final Metadata.Key<String> AUTHORIZATION =
            Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
    private static final EventLoopGroup UNIX_LOOP =
            new MultiThreadIoEventLoopGroup(1, new DefaultThreadFactory("unix", true), NioIoHandler.newFactory());

    private Channels() {}

    static ManagedChannel open(JsonObject scenario, JsonObject server) {
        NettyChannelBuilder builder = builder(server.get("address").getAsString()).usePlaintext();
        JsonElement keepalive = scenario.get("keepalive_seconds");
        if (keepalive != null) {
            builder.keepAliveTime(Math.round(keepalive.getAsDouble() * 1000), TimeUnit.MILLISECONDS);
        }
        JsonElement token = scenario.has("token") ? scenario.get("token") : server.get("token");
        if (token != null && !token.getAsString().isEmpty()) {
            builder.intercept(bearer(token.getAsString()));
        }
        return builder.build();
    }

    private static NettyChannelBuilder builder(String address) {
        if (!address.startsWith(UNIX)) {
            return NettyChannelBuilder.forTarget(address);
        }
        // The target "unix:/path" needs epoll, so Linux; the sockets of the JDK do wherever Java 17 runs.
        return NettyChannelBuilder.forAddress(UnixDomainSocketAddress.of(address.substring(UNIX.length())))
                .overrideAuthority("localhost")
                .eventLoopGroup(UNIX_LOOP)
                .channelType(NioDomainSocketChannel.class);
    }

    private static ClientInterceptor bearer(String token) {
        var headers = new Metadata();
        headers.put(AUTHORIZATION, "Bearer " + token);
        return MetadataUtils.newAttachHeadersInterceptor(headers);
    }
}
