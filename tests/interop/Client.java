// gRPC's interoperability cases with grpc-java; Client PORT prints each case that passed. Messages are written and
// read field by field, so that no generated code is needed.
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.netty.NettyChannelBuilder;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.util.Arrays;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;

public final class Client {
  private static final int[] RESPONSES = {31415, 9, 2653, 58979};
  private static final int[] REQUESTS = {27182, 8, 1828, 45904};
  private static final String SPECIAL =
      "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \ud83d\ude08\t\n";
  private static final Metadata.Key<String> INITIAL =
      Metadata.Key.of("x-grpc-test-echo-initial", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<byte[]> TRAILING =
      Metadata.Key.of("x-grpc-test-echo-trailing-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private static final MethodDescriptor.Marshaller<byte[]> BYTES =
      new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] value) {
          return new ByteArrayInputStream(value);
        }

        @Override
        public byte[] parse(InputStream stream) {
          try {
            return stream.readAllBytes();
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        }
      };

  // What a call brings: messages in their order, and its end, which is a Status.
  private static final class Call extends ClientCall.Listener<byte[]> {
    final ClientCall<byte[], byte[]> call;
    final BlockingQueue<Object> events = new LinkedBlockingQueue<>();
    volatile Metadata headers;
    volatile Metadata trailers;

    Call(Channel channel, String method, CallOptions options, Metadata metadata) {
      MethodDescriptor<byte[], byte[]> descriptor =
          MethodDescriptor.<byte[], byte[]>newBuilder(BYTES, BYTES)
              .setType(MethodDescriptor.MethodType.BIDI_STREAMING)
              .setFullMethodName(method)
              .build();
      call = channel.newCall(descriptor, options);
      call.start(this, metadata);
      call.request(Integer.MAX_VALUE);
    }

    @Override
    public void onHeaders(Metadata got) {
      headers = got;
    }

    @Override
    public void onMessage(byte[] message) {
      events.add(message);
    }

    @Override
    public void onClose(Status status, Metadata got) {
      trailers = got;
      events.add(status);
    }

    Object next() throws InterruptedException {
      Object event = events.poll(30, TimeUnit.SECONDS);
      must(event != null, "nothing came for 30 s");
      return event;
    }

    byte[] message() throws InterruptedException {
      Object event = next();
      must(event instanceof byte[], "a message was expected and not " + event);
      return (byte[]) event;
    }

    Status end() throws InterruptedException {
      Object event = next();
      must(event instanceof Status, "the end was expected and not a message");
      return (Status) event;
    }
  }

  private static void must(boolean holds, String otherwise) {
    if (!holds) throw new AssertionError(otherwise);
  }

  private static byte[] join(byte[]... parts) {
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    for (byte[] part : parts) out.writeBytes(part);
    return out.toByteArray();
  }

  private static byte[] varint(long value) {
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    for (; value >= 128; value >>>= 7) out.write((int) (value & 127 | 128));
    out.write((int) value);
    return out.toByteArray();
  }

  private static byte[] number(int field, long value) {
    return join(varint(field << 3), varint(value));
  }

  private static byte[] nested(int field, byte[] value) {
    return join(varint(field << 3 | 2), varint(value.length), value);
  }

  private static byte[] payload(int field, int size) {
    return nested(field, nested(2, new byte[size]));
  }

  private static byte[] ask(int response, int request, int intervalUs) {
    return join(nested(2, join(number(1, response), number(2, intervalUs))), payload(3, request));
  }

  private static byte[] echoStatus(String text) {
    byte[] bytes = text.getBytes(java.nio.charset.StandardCharsets.UTF_8);
    return nested(7, join(number(1, 2), nested(2, bytes)));
  }

  // The size of payload.body, as the only field of the only field.
  private static int bodySize(byte[] message) {
    int[] place = {0};
    for (int level = 0; level < 2; ++level) {
      must(readVarint(message, place) == (level == 0 ? 10 : 18), "an unexpected field");
      must(readVarint(message, place) > 0 || level == 1, "an empty payload");
    }
    return message.length - place[0];
  }

  private static long readVarint(byte[] bytes, int[] place) {
    long value = 0;
    for (int shift = 0; ; shift += 7) {
      byte one = bytes[place[0]++];
      value |= (long) (one & 127) << shift;
      if (one >= 0) return value;
    }
  }

  private final ManagedChannel channel;

  private Client(ManagedChannel channel) {
    this.channel = channel;
  }

  private Call open(String method, CallOptions options, Metadata metadata) {
    return new Call(channel, "grpc.testing." + method, options, metadata);
  }

  private Call open(String method) {
    return open("TestService/" + method, CallOptions.DEFAULT, new Metadata());
  }

  // Sends one request and half-closes.
  private Call ask(String method, CallOptions options, Metadata metadata, byte[] request) {
    Call opened = open(method, options, metadata);
    opened.call.sendMessage(request);
    opened.call.halfClose();
    return opened;
  }

  private Call ask(String method, byte[] request) {
    return ask("TestService/" + method, CallOptions.DEFAULT, new Metadata(), request);
  }

  private static void mustBe(Status status, Status.Code code) {
    must(status.getCode() == code, code + " was expected and not " + status);
  }

  private void run() throws Exception {
    Call call = ask("EmptyCall", new byte[0]);
    must(call.message().length == 0, "not empty");
    mustBe(call.end(), Status.Code.OK);
    System.out.println("empty_unary");

    byte[] large = join(number(2, 314159), payload(3, 271828));
    for (String name : new String[] {"large_unary", "compressed_unary"}) {
      CallOptions options = CallOptions.DEFAULT;
      if (name.startsWith("compressed")) options = options.withCompression("gzip");
      call = open("TestService/UnaryCall", options, new Metadata());
      call.call.setMessageCompression(true);
      call.call.sendMessage(large);
      call.call.halfClose();
      must(bodySize(call.message()) == 314159, name);
      mustBe(call.end(), Status.Code.OK);
      System.out.println(name);
    }

    call = open("StreamingInputCall");
    for (int size : REQUESTS) call.call.sendMessage(payload(1, size));
    call.call.halfClose();
    must(Arrays.equals(call.message(), number(1, 74922)), "client_streaming");
    mustBe(call.end(), Status.Code.OK);
    System.out.println("client_streaming");

    ByteArrayOutputStream all = new ByteArrayOutputStream();
    for (int size : RESPONSES) all.writeBytes(nested(2, number(1, size)));
    call = ask("StreamingOutputCall", all.toByteArray());
    for (int size : RESPONSES) must(bodySize(call.message()) == size, "server_streaming");
    mustBe(call.end(), Status.Code.OK);
    System.out.println("server_streaming");

    call = open("FullDuplexCall");
    for (int i = 0; i < RESPONSES.length; ++i) {
      call.call.sendMessage(ask(RESPONSES[i], REQUESTS[i], 0));
      must(bodySize(call.message()) == RESPONSES[i], "ping_pong");
    }
    call.call.halfClose();
    mustBe(call.end(), Status.Code.OK);
    System.out.println("ping_pong");

    call = open("FullDuplexCall");
    call.call.halfClose();
    mustBe(call.end(), Status.Code.OK);
    System.out.println("empty_stream");

    call = open("StreamingInputCall");
    call.call.cancel("begun", null);
    mustBe(call.end(), Status.Code.CANCELLED);
    System.out.println("cancel_after_begin");

    call = open("FullDuplexCall");
    call.call.sendMessage(ask(RESPONSES[0], REQUESTS[0], 0));
    must(bodySize(call.message()) == RESPONSES[0], "cancel_after_first_response");
    call.call.cancel("enough", null);
    mustBe(call.end(), Status.Code.CANCELLED);
    System.out.println("cancel_after_first_response");

    CallOptions hasty = CallOptions.DEFAULT.withDeadlineAfter(50, TimeUnit.MILLISECONDS);
    call = open("TestService/FullDuplexCall", hasty, new Metadata());
    call.call.sendMessage(ask(RESPONSES[0], REQUESTS[0], 20_000_000));
    mustBe(call.end(), Status.Code.DEADLINE_EXCEEDED);
    System.out.println("timeout_on_sleeping_server");

    for (String text : new String[] {"test status message", SPECIAL}) {
      for (String method : new String[] {"UnaryCall", "FullDuplexCall"}) {
        Status status = ask(method, echoStatus(text)).end();
        mustBe(status, Status.Code.UNKNOWN);
        must(text.equals(status.getDescription()), "status_code_and_message: " + status);
      }
    }
    System.out.println("status_code_and_message");

    byte[] three = {(byte) 0xab, (byte) 0xab, (byte) 0xab};
    for (String method : new String[] {"UnaryCall", "FullDuplexCall"}) {
      Metadata metadata = new Metadata();
      metadata.put(INITIAL, "test_initial_metadata_value");
      metadata.put(TRAILING, three);
      byte[] request = method.equals("UnaryCall") ? number(2, 10) : ask(10, 10, 0);
      call = ask("TestService/" + method, CallOptions.DEFAULT, metadata, request);
      must(bodySize(call.message()) == 10, "custom_metadata");
      mustBe(call.end(), Status.Code.OK);
      must("test_initial_metadata_value".equals(call.headers.get(INITIAL)), "custom_metadata: " + call.headers);
      must(Arrays.equals(three, call.trailers.get(TRAILING)), "custom_metadata: " + call.trailers);
    }
    System.out.println("custom_metadata");

    for (String service : new String[] {"TestService", "UnimplementedService"}) {
      Call unknown = ask(service + "/UnimplementedCall", CallOptions.DEFAULT, new Metadata(), new byte[0]);
      mustBe(unknown.end(), Status.Code.UNIMPLEMENTED);
    }
    System.out.println("unimplemented_method_and_service");
  }

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        NettyChannelBuilder.forAddress("127.0.0.1", Integer.parseInt(arguments[0])).usePlaintext().build();
    new Client(channel).run();
    channel.shutdownNow();
    must(channel.awaitTermination(30, TimeUnit.SECONDS), "the channel does not end");
  }
}
